"""Room adapt: train a form attached to a frozen model on question/answer pairs; adapters in PEFT format."""
