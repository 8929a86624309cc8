"""Systems that decide how much depth or work a token gets. One module per paper."""
