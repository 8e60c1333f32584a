"""Every setting of Lectern: `schema.py` has the fields and their defaults, the YAML files the presets."""
