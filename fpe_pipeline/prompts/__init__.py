"""Text as a model sees it: words, their tokens, and what a pipeline encoded."""
