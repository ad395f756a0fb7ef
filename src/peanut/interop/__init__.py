"""Converts models in memory between Hugging Face PEFT and this library, in place."""
