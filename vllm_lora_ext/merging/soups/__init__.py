"""LoRA Soups: adapters with a learned weight per module, their files, and the learning."""
