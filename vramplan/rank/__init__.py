"""One rank of a job, for real: transformers' model, PEFT's adapters, the optimizer and DeepSpeed's engine.

What is measured and what is simulated is this same code; only where its tensors live differs. Imports torch.
"""
