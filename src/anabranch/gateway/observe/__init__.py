"""What operators see of requests from outside: traces, an access log, labels by sender, webhooks."""
