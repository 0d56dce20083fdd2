"""The architectures behind today's language models, from shared components, with one loop to train them."""
