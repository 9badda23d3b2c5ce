"""Formats: from a row of any known shape to a Conversation.

In: a row (a dict) and its place. Out: a Conversation, a RowError that says
what is wrong with the row, or NothingToTrain.
Read `formats` (the table of formats and `to_conversation`), then `chat`,
`instruction` and `pretokenized`, one for each family of rows; `fields` reads
single fields for all of them.
"""
