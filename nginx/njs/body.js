// What a request asks for, read out of its body.

const BRACE = 123;           // {: every JSON body here begins so
const PARSED = 1 << 20;      // characters; of a longer body only the model is read

// {model, body, session}: the model's name or '', what prefix.js cuts, and what the session is called. Bodies that are no
// JSON object give no model: the replica says what is wrong.
function read(r, text) {
    const { model, body } = parse(r, text);
    return { model, body, session: r.headersIn['X-Session-Id'] || body.prompt_cache_key };
}

function parse(r, text) {
    if (text.charCodeAt(0) !== BRACE && /^multipart\//.test(r.headersIn['Content-Type'])) {
        const field = /name="model"\r\n\r\n([^\r\n]*)/.exec(text);
        return { model: field ? field[1] : '', body: {} };
    }
    if (text.length > PARSED) {
        // Model and messages are near one of the two ends in every client's layout.
        const field = /^\s*\{\s*"model"\s*:\s*"([^"\\]*)"/.exec(text.slice(0, 512))
            || /,\s*"model"\s*:\s*"([^"\\]*)"\s*(?:,\s*"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*)*\}\s*$/.exec(text.slice(-512));
        if (field) {
            return { model: field[1], body: { prompt: text.slice(0, PARSED / 4) } };
        }
    }
    try {
        const body = JSON.parse(text);
        if (body && typeof body === 'object') {
            return { model: typeof body.model === 'string' ? body.model : '', body };
        }
    } catch (e) {
        // not JSON
    }
    return { model: '', body: {} };
}

export default { read };
