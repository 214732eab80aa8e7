"""Results on the Hugging Face Hub: what a folder is, its model card, and bringing both there."""
