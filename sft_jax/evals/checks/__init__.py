"""Whether a reply satisfies what its prompt declares.

In come a reply and the arguments of a check; out comes True or False. Read
checks (the table, validation), ifeval, tool_calls, json_schema, refusals.
"""
