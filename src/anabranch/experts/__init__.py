"""Systems that route tokens to experts. One module per paper."""
