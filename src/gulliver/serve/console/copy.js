// Copies text: through the clipboard API where the page is secure, else (plain http in a home network) by selection.

// True when it was copied. `near` is an element in whose dialog or page the helper may be selected.
export async function copyText(text, near) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Refused by the browser: try the selection.
    }
  }
  const focused = document.activeElement;
  const helper = document.createElement("textarea");
  helper.value = text;
  helper.className = "unseen";
  (near ?? document.body).append(helper);
  helper.select();
  const copied = document.execCommand("copy");
  helper.remove();
  focused?.focus({ preventScroll: true });
  return copied;
}
