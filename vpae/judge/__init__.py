"""The judge of Bounce: what the pixels say against caption, law and simulator, with no learned model."""
