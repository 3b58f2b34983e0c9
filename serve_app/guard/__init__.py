"""What a request may ask for, checked before anything is made of it.

``body``       ``check_body``: what the keys of a completion may be
``document``   the JSON that they come in
``structure``  schemas, patterns and grammars, which an engine compiles
``limits``     the largest values, and the sentences in which others are refused
"""
