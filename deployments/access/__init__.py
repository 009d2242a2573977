"""Access: API keys, scopes and rate limits; which hosts, web pages and heads of requests are accepted."""
