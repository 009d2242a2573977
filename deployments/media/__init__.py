"""Images, audio and video in messages: which are taken, and how many tokens they are."""
