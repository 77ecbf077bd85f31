"""Finished systems for tasks, with the field's standard verbs (fit, predict, evaluate, save_pretrained)."""
