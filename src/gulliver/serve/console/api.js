// Requests to the server that sent this page, and to no other: the OpenAI API and the models' cards.

// An answer of the server that is an error, or none at all (status 0), with a sentence for the reader.
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfterSeconds = 0 } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

export async function getJson(path, key) {
  const response = await send(path, { headers: headers(key) });
  try {
    return await response.json();
  } catch {
    throw new ApiError(`The server's answer to ${path} is not JSON.`, { status: response.status });
  }
}

// The chunks of a streamed chat completion, parsed, until [DONE]. ApiError for an error before or within the stream;
// an AbortError when `signal` is aborted.
export async function* streamChat(body, key, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body.getReader())) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent a line of the stream that is not JSON.");
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server stopped.", { code: chunk.error.code });
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

// The data of each server-sent event.
async function* events(reader) {
  const decoder = new TextDecoder();
  let waiting = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      waiting += decoder.decode(value, { stream: !done }) + (done ? "\n\n" : "");
      const lines = waiting.split(/\r\n|\n|\r(?!$)/);
      waiting = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, so that the server stops computing
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server was lost.");
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running, and is this machine online?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    const body = await response.json();
    error = body.error ?? { message: typeof body.detail === "string" ? body.detail : "" };
  } catch {
    // A proxy's error page: the status alone must do.
  }
  return new ApiError(error.message || `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error.code ?? "",
    retryAfterSeconds: retryAfter(response.headers.get("Retry-After")),
  });
}

// Seconds to wait, from either form of the header: seconds or a date; 0 when there is none.
function retryAfter(value) {
  if (!value) return 0;
  const seconds = Number(value);
  const wait = Number.isFinite(seconds) ? seconds : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : 0;
}
