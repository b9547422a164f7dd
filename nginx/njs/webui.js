// Who comes to Open WebUI: users who signed in here with their password.
//
// What the token service gave them lies in a cookie that no script can read. Each request and each WebSocket is let in by it,
// and Open WebUI is told who it is in headers that are the gateway's alone.

import keys from './keys.js';

const COOKIE = 'fleet_token';

const PAGE = `<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Sign in</title>
  <link rel="icon" href="data:,">
  <style>
    body { display: grid; min-height: 90vh; place-items: center; font: 16px/1.5 system-ui, sans-serif; }
    form { display: grid; gap: .5rem; width: min(20rem, 90vw); }
    h1 { margin: 0; font-size: 1.4rem; }
    input, button { padding: .5rem; font: inherit; }
    [role=alert] { margin: 0; min-height: 1.5em; color: light-dark(#b00020, #ff8a80); }
  </style>
</head>
<body>
  <form method="post" action="/sign-in">
    <h1>Sign in</h1>
    <label for="username">Name</label>
    <input id="username" name="username" autocomplete="username" autocapitalize="none" required autofocus>
    <label for="password">Password</label>
    <input id="password" name="password" type="password" autocomplete="current-password" required>
    <button>Sign in</button>
    <p role="alert">WHY</p>
  </form>
</body>
</html>
`;

function page(r, status, why) {
    r.headersOut['Content-Type'] = 'text/html; charset=utf-8';
    r.headersOut['Cache-Control'] = 'no-store';
    r.return(status, PAGE.replace('WHY', why));
}

function cookies(r) {
    return (r.headersIn.Cookie || '').split(';').map((one) => one.trim()).filter((one) => one);
}

// $webui_cookie: the cookies that are Open WebUI's.
function others(r) {
    return cookies(r).filter((one) => !one.startsWith(`${COOKIE}=`)).join('; ');
}

// The holder of a token, null where it is not taken. A key opens the API, not this: it has no name of a user's.
async function holderOf(token) {
    // reads the keys where nobody has yet
    const holder = keys.required() && token ? await keys.holderOf(token) : {};
    return holder.token ? holder : null;
}

async function visitor(r) {
    const found = cookies(r).find((one) => one.startsWith(`${COOKIE}=`));
    return found ? holderOf(found.slice(COOKIE.length + 1)) : null;
}

// Whether a page of another origin sends this: its browser would add the cookie. Another port of this host is another origin,
// though the cookie goes there too.
function foreign(r) {
    const origin = r.headersIn.Origin;
    return origin !== undefined && origin.replace(/^https?:\/\//, '') !== (r.headersIn.Host || '').toLowerCase();
}

// Open WebUI takes small letters for capital ones, so capitals are spelt out: else two of a provider's users could be one.
function small(name) {
    return name.replace(/%..|[A-Z]/g, (found) => (found[0] === '%' ? found.toLowerCase() : `%${found.charCodeAt(0).toString(16)}`));
}

// js_access of all that is Open WebUI's.
async function enter(r) {
    const holder = await visitor(r);
    if (!holder) {
        if (r.method === 'GET' && /text\/html/.test(r.headersIn.Accept)) {
            r.return(303, '/sign-in');
        } else {
            answer(r, 401, 'Sign in first.');
        }
    } else if (foreign(r)) {
        answer(r, 403, `Pages of ${r.headersIn.Origin.slice(0, 200)} may not use Open WebUI.`);
    } else {
        const left = Math.max(1, Math.ceil(holder.until - Date.now() / 1000));
        r.variables.key = holder.name;
        r.variables.webui_user = small(holder.name);
        r.variables.webui_name = holder.name.replace(/^[^:#]*[:#]/, '');
        r.variables.webui_role = holder.role;
        r.variables.webui_seconds = left;
    }
}

// In the shape of Open WebUI's own errors.
function answer(r, status, message) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(status, JSON.stringify({ detail: message }));
}

// js_content of /sign-in: the form, and what it sends.
async function signIn(r) {
    if (r.method === 'GET' || r.method === 'HEAD') {
        if (await visitor(r)) {
            r.return(303, '/');
        } else {
            page(r, 200, '');
        }
        return;
    }
    if (r.method !== 'POST') {
        r.headersOut.Allow = 'GET, POST';
        answer(r, 405, `/sign-in takes GET and POST, not ${r.method}.`);
        return;
    }
    if (foreign(r)) {
        page(r, 403, 'This form was sent by a page from elsewhere. Sign in here.');
        return;
    }
    const reply = await r.subrequest('/token', { method: 'POST', body: r.requestText || '' });
    if (reply.status === 429) {
        const seconds = parseInt(reply.headersOut['Retry-After'], 10) || 60;
        page(r, 429, `Too many wrong passwords. Wait ${seconds === 1 ? 'a second' : `${seconds} seconds`}.`);
    } else if (reply.status >= 500) {
        page(r, 503, 'Nobody can sign in at the moment. Try again in a minute.');
    } else if (reply.status !== 200) {
        page(r, 401, 'No such user, or another password.');
    } else {
        const { access_token: token, expires_in: seconds } = JSON.parse(reply.responseText);
        if (await holderOf(token)) {
            const secure = r.variables.scheme === 'https' ? '; Secure' : '';
            r.headersOut['Set-Cookie'] = [`${COOKIE}=${token}; Path=/; Max-Age=${seconds}; HttpOnly; SameSite=Lax${secure}`];
            r.return(303, '/');
        } else {
            page(r, 503, 'The gateway does not take the token that you were given. GATEWAY_AUTH=off lets nobody sign in.');
        }
    }
}

function away(r) {
    answer(r, 503, 'Open WebUI does not answer. It may still be starting; COMPOSE_PROFILES=webui in .env starts it.');
}

export default { enter, signIn, others, away };
