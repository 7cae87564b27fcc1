"""Room adapt: fine-tune a frozen model with adapters on question/answer pairs; adapters in PEFT format."""
