"""What a recipe picks by name: compression, training, aggregation, fusion and what rides with a round."""
