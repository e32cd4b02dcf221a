"""Frames in, frames out: WebRTC peers, pacing and wire messages. Knows no torch and no meaning of a prompt."""
