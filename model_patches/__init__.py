"""The only place that touches vLLM's internals. `register.PATCHES` lists every patch."""
