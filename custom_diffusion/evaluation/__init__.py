"""Is the concept learned, and is anything forgotten: prompts, images drawn from them, their scores, and the page that shows both."""
