"""Everything that knows SGLang. Imports point down: hooking, startup, runtime, hooks, doctor, plugin."""
