"""Captions by a vision-language model: what is asked, who answers, which answers are of use, where they are written."""
