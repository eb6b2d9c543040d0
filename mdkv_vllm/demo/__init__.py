"""``mdkv demo``: what compression does to one question and to one long answer."""
