"""What a run leaves for its readers: exports, model cards, figures, reports, and what is sent to the Hub."""
