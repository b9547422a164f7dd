#!/bin/sh
# llm: a prompt in the shell.
#
# A file names the models of the fleet; it holds no key. `llm logs off` keeps llm from storing prompts.
set -eu
export LLM_USER_PATH="${LLM_USER_PATH:-$HOME/.config/io.datasette.llm}"
mkdir -p "$LLM_USER_PATH"
cat >"$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: fleet
  model_name: $MODEL
  api_base: $OPENAI_BASE_URL
  api_key_name: fleet
END
uvx llm==0.36 logs off
uvx llm==0.36 --model fleet --key "$OPENAI_API_KEY" --option max_tokens 40 'What is the capital of France?'
