"""Replies that are JSON of a given form, whatever the model: python examples/json_schema.py [MODEL]

The schema is enforced while the reply is made: tokens that don't fit can't be chosen. The built-in demo obeys it too,
but the values that it fills in are nonsense.
"""

import json
import sys

import mlx_gemma4

SCHEMA = {
    "type": "object",
    "properties": {
        "hero": {"type": "string", "maxLength": 20},
        "animal": {"enum": ["goose", "fox", "hedgehog"]},
        "gold_pieces": {"type": "integer", "minimum": 0, "maximum": 1000},
        "ends_well": {"type": "boolean"},
    },
    "required": ["hero", "animal", "gold_pieces", "ends_well"],
    "additionalProperties": False,
}

lm = mlx_gemma4.load(*sys.argv[1:])
reply = mlx_gemma4.chat(lm, "Invent a fairy tale and give me its key facts.", schema=SCHEMA, max_tokens=200)
facts = json.loads(reply.text)
print(json.dumps(facts, indent=2, ensure_ascii=False))
