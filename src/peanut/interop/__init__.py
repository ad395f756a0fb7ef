"""Live models of Hugging Face PEFT made ours in place, and ours made theirs."""
