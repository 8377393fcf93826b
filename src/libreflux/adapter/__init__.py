"""LoKr and LoRA on a frozen transformer: layers, targets, first values, files, merging."""
