"""Documentation: the API's description, its examples, and the page /docs, which works without internet."""
