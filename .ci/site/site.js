// The folding menu and the search box of the stand-in's pages. The index is a script, not a fetch, so that it works from a folder too.
const up = document.currentScript.dataset.up
document.documentElement.classList.add('js')

const menu = document.getElementById('menu'), site = document.getElementById('site')
menu.onclick = () => menu.setAttribute('aria-expanded', site.classList.toggle('open'))
site.querySelector('[aria-current]')?.scrollIntoView({block: 'nearest'})
scrollTo(0, location.hash ? scrollY : 0)

const box = document.getElementById('search'), found = document.getElementById('found')
let loading, at = -1

function index() {
  return loading ??= new Promise((ok, bad) => {
    const s = document.createElement('script')
    s.src = up + 'search-index.js'
    s.onload = () => ok(window.searchIndex)
    s.onerror = bad
    document.head.append(s)
  })
}

// An entry is [page, title, anchor, heading, text]. Each word must occur; a title counts most, then a heading
function score([page, title, anchor, heading, text], words) {
  const [t, h, b] = [title, heading, text].map(o => o.toLowerCase())
  let res = 0
  for (const w of words) {
    const here = (anchor ? 0 : 20*t.includes(w)) + 10*h.includes(w) + Math.min(5, b.split(w).length - 1)
    if (!here && !t.includes(w)) return 0
    res += here + (h == w || t == w ? 15 : 0)
  }
  return res
}

function excerpt(text, word) {
  const i = Math.max(0, text.toLowerCase().indexOf(word) - 40)
  return (i ? '… ' : '') + text.slice(i, i + 130) + (text.length > i + 130 ? ' …' : '')
}

function item(href, head, small) {
  const li = document.createElement('li'), a = document.createElement('a'), s = document.createElement('small')
  li.setAttribute('role', 'option')
  li.id = 'found-' + found.children.length
  a.href = href
  a.tabIndex = -1
  s.textContent = small
  a.append(head, s)
  li.append(a)
  found.append(li)
}

function choose(i) {
  const all = found.querySelectorAll('[role=option]')
  at = all.length ? (i + all.length) % all.length : -1
  all.forEach((o, j) => o.setAttribute('aria-selected', j == at))
  if (at < 0) return box.removeAttribute('aria-activedescendant')
  box.setAttribute('aria-activedescendant', all[at].id)
  all[at].scrollIntoView({block: 'nearest'})
}

function close() {
  found.hidden = true
  box.setAttribute('aria-expanded', false)
}

async function look() {
  const asked = box.value, words = asked.toLowerCase().split(/\s+/).filter(Boolean)
  if (!words.length) return close()
  const all = await index()
  if (asked != box.value) return // more has been typed meanwhile
  const best = all.map(e => [score(e, words), e]).filter(o => o[0]).sort((a, b) => b[0] - a[0]).slice(0, 12)
  found.replaceChildren()
  for (const [, [page, title, anchor, heading, text]] of best)
    item(up + page + (anchor ? '#' + anchor : ''), heading ? title + ' › ' + heading : title, excerpt(text, words[0]))
  if (!best.length) {
    const li = document.createElement('li')
    li.className = 'none'
    li.textContent = 'Nothing found'
    found.append(li)
  }
  found.hidden = false
  box.setAttribute('aria-expanded', true)
  choose(0)
}

box.oninput = look
box.onfocus = () => { index(); look() }
box.onkeydown = e => {
  if (e.key == 'ArrowDown') choose(at + 1)
  else if (e.key == 'ArrowUp') choose(at - 1)
  else if (e.key == 'Escape') close()
  else if (e.key == 'Enter') {
    const a = found.querySelector('[aria-selected=true] a')
    if (a && !found.hidden) { close(); a.click() }
  } else return
  e.preventDefault()
}
document.addEventListener('click', e => { if (!e.target.closest('.search')) close() })
document.addEventListener('keydown', e => {
  if (e.key != '/' || e.ctrlKey || e.metaKey || e.altKey || /^(input|textarea|select)$/i.test(e.target.tagName)) return
  box.focus()
  e.preventDefault()
})
