"""The orchestrations (fine-tune, export, ...): the only place where model, data, plan, store and engine meet."""
