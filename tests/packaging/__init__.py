"""What people install: the wheel, the image and its steps, and the words that tell of them."""
