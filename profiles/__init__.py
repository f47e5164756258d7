"""Hardware presets as TOML files; read through `memopt.machine.Machine.load`."""
