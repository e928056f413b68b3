"""Text to token ids and back.

- ``tokenizer``: :class:`Tokenizer`, from a bundle's tokenizer.json.
- ``detokenizer``: decoding token by token.
- ``stop_strings``: the text of a sequence, ended by stop strings.
- ``prompts``: encoding of text, chats and token ids.
- ``prompt_files``: prompts from files and stdin.
- ``chat``, ``chat_environment``: chat templates and their sandbox.
"""
