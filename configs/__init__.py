"""The recipes, installed as dino_d2.configs. `dino_d2.load_config` finds them by name."""
