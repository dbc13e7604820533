"""Parts that tests and demonstrations share; nothing else imports them."""
