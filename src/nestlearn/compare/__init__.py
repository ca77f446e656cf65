"""Models side by side: equal parameters, tokens, text, order, optimizer and search; one table and one page."""
