// Keeps the end of the conversation in view while it grows, unless the reader has scrolled away from it.

const NEAR_PX = 32;

export class Scroller {
  #area;
  #list;
  #jump;
  #following = true;
  #last = 0;

  // `area` scrolls, `list` in it grows, and the button `jump` leads to the end.
  constructor(area, list, jump) {
    this.#area = area;
    this.#list = list;
    this.#jump = jump;
    area.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    jump.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.follow()).observe(area);
    // A browser that lays the on-screen keyboard over the page (Safari) tells the height that is left.
    const { visualViewport } = window;
    visualViewport?.addEventListener("resize", () => {
      const covered = innerHeight - visualViewport.height > 80 && visualViewport.scale === 1;
      document.documentElement.style.setProperty("--height", covered ? `${visualViewport.height}px` : "100dvh");
      if (covered) scrollTo(0, 0);
    });
  }

  follow() {
    if (this.#following && this.#list.children.length) this.#area.scrollTop = this.#area.scrollHeight;
    this.#showJump();
  }

  toEnd() {
    this.#following = true;
    this.follow();
  }

  toStart() {
    this.#following = true;
    this.#area.scrollTop = 0;
    this.#showJump();
  }

  #scrolled() {
    const { scrollTop } = this.#area;
    if (scrollTop < this.#last - 1 && this.#left() > 4) this.#following = false;
    else if (this.#left() < NEAR_PX) this.#following = true;
    this.#last = scrollTop;
    this.#showJump();
  }

  #left() {
    return this.#area.scrollHeight - this.#area.clientHeight - this.#area.scrollTop;
  }

  #showJump() {
    this.#jump.hidden = this.#following || !this.#list.children.length || this.#left() < NEAR_PX;
  }
}
