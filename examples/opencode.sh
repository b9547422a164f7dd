#!/bin/sh
# opencode: a coding agent in the terminal.
#
# Its config names the fleet as a provider, and the context and output of the model, which it cannot ask for. The last
# settings keep it from asking anybody else.
set -eu
OPENCODE_CONFIG="${OPENCODE_CONFIG:-$PWD/opencode.json}"
export OPENCODE_CONFIG
cat >"$OPENCODE_CONFIG" <<END
{
  "model": "fleet/$MODEL",
  "autoupdate": false,
  "share": "disabled",
  "provider": {
    "fleet": {
      "npm": "@ai-sdk/openai-compatible",
      "options": {"baseURL": "{env:OPENAI_BASE_URL}", "apiKey": "{env:OPENAI_API_KEY}"},
      "models": {"$MODEL": {"limit": {"context": 32768, "output": 4096}}}
    }
  }
}
END
export OPENCODE_DISABLE_MODELS_FETCH=1 OPENCODE_DISABLE_AUTOUPDATE=1 OPENCODE_DISABLE_DEFAULT_PLUGINS=1
npx --yes opencode-ai@1.18.33 run 'Say hello.'
