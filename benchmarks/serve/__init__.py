"""The server under load, beside a plain one."""
