"""Calibration by a server's own traffic: the file of key channels is kept up to date while the server serves.

It serves whole keys with its stock attention; only what its prompts ask of the channels is recorded
(memopt.patches.vllm_calibrate). The file is whole at any time, so a server that is killed leaves the last one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, ModelIdentity, save_channels
from memopt.kv.channels import choose, kept_count
from memopt.kv.joint import ASKED
from memopt.kv.score_sums import MULTIPLE
from memopt.patches.hf_files import resolve_checkpoint
from memopt.patches.hf_identity import identity_of, stored_digest
from memopt.patches.vllm_calibrate import Recorder, watch
from memopt.patches.vllm_config import Calibration
from memopt.patches.vllm_guard import Receipt, refuse

_LOOK_S = 1.0
_LOOKS = 10


class LiveFile:
    """Writes what a recorder knows, on a thread of its own.

    Written when no prompt came for a second, and while they come every ten; a server that ends may kill its workers
    without a word, so not much may be left for then.
    """

    def __init__(self, recorder: Recorder, asked: Calibration, model: ModelIdentity) -> None:
        self._recorder, self._asked, self._model = recorder, asked, model
        self._count = kept_count(model.head_dim, asked.keep, multiple=MULTIPLE)
        self._written = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        threading.Thread(target=self._run, name="memopt-calibrate", daemon=True).start()

    def save(self) -> None:
        """Write the file, if more was heard than is in it.

        Raises:
            BadInput: it cannot be written, or the scores are not finite.
        """
        with self._lock:
            heard = self._recorder.prompts
            if heard == self._written:
                return
            scores, tokens = self._recorder.scores()
            keys = {layer: choose(each, self._count) for layer, each in scores.items()}
            sets = ChannelSets(model=self._model, keep=self._asked.keep, keys=keys, tokens=tokens)
            save_channels(self._asked.path, sets)
            self._written = heard

    def close(self) -> None:
        """Write once more, and stop."""
        self._end.set()
        self._try()

    def _run(self) -> None:
        before, looks = 0, 0
        while not self._end.wait(_LOOK_S):
            heard, looks = self._recorder.prompts, looks + 1
            if heard == before or looks >= _LOOKS:
                self._try()
                looks = 0
            before = heard

    def _try(self) -> None:
        try:
            self.save()
        except BadInput as error:
            # the server goes on: its answers do not depend on the file
            logging.getLogger("vllm.memopt").warning("memopt: %s", error)


def install(asked: Calibration) -> Callable[[], None]:
    """Record in this process, if a worker is made in it; call the result to stop."""
    recorder = Recorder(asked=ASKED)

    def begin(config: Any) -> Callable[[], None]:
        if not recorder.layers:
            raise refuse("no layer of this model attends to the whole context, so there is nothing to calibrate")
        try:
            directory = resolve_checkpoint(config.model_config.model)
            model = identity_of(config.model_config.hf_config, weights=stored_digest(directory))
        except BadInput as error:
            raise refuse(str(error)) from error
        Receipt(layers=len(recorder.layers), head_size=model.head_dim, kept=model.head_dim).save()
        return LiveFile(recorder, asked, model).close

    return watch(recorder, begin)
