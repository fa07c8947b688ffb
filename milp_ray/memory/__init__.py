"""What is stored where: the search space, the layout θ = (α, n, r), and a layout as a PEFT configuration."""
