"""Joins the generator and the wire: server, sessions, worker process, command line."""
