"""The procedural world and the distillation trainer."""
