"""Facts as data: language models, towers, templates, recipes, devices. No torch is imported."""
