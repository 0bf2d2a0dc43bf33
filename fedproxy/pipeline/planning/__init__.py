"""What a recipe will take, counted from shapes: bytes on the wire, memory of every role, seconds of a round."""
