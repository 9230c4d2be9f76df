"""Being-VL-0.5 as it is published: its artefacts, written anew at any size, and what becomes of
every command, option, variable, file and method of its documents.
"""
